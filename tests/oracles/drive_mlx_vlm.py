"""What mlx-vlm makes of an `mlx` bundle: run by its own interpreter, knows nothing of ours.

    python drive_mlx_vlm.py BUNDLE PICTURE PIXELS.npy OUT.npz

OUT gets the encoder's and the projector's output for the given pixels [1, 3, S, S], and the pixels
that mlx-vlm itself makes of the picture.
"""

import sys

import mlx.core as mx
import numpy as np
from mlx_vlm import load
from PIL import Image

bundle, picture, pixels, out = sys.argv[1:]
model, processor = load(bundle)
tower = model.vision_tower
dtype = tower.vision_model.patch_embed.blocks[0].reparam_conv.weight.dtype
_, features, _ = tower(mx.array(np.load(pixels)).astype(dtype).transpose(0, 2, 3, 1))
features = features.reshape(1, -1, features.shape[-1])
own = processor(images=[Image.open(picture)], text="<image>")["pixel_values"]
np.savez(
    out,
    features=np.array(features.astype(mx.float32)),
    projected=np.array(model.mm_projector(features).astype(mx.float32)),
    pixels=np.array(own),
)
