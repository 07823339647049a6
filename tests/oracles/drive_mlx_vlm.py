"""What mlx-vlm makes of an `mlx` bundle: run by its own interpreter, knows nothing of ours.

    python drive_mlx_vlm.py BUNDLE IMAGE PIXELS.npy OUT.npz PROMPT MAX_TOKENS [own-shape]

OUT gets the encoder's and the projector's output for the given pixels [1, 3, S, S], and the pixels
that mlx-vlm itself makes of the image; the greedy answer is the last line printed, as JSON.

mlx-vlm takes the encoder's shape from attributes of a class and not from the bundle. `own-shape`
sets them to the bundle's before it loads, for encoders smaller than the published one.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm import generate, load
from mlx_vlm.models.fastvlm.config import VisionConfig
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

bundle, image, pixels, out, prompt, max_tokens, *own_shape = sys.argv[1:]
if own_shape:
    shape = json.loads((Path(bundle) / "config.json").read_text())["vision_config"]
    for key in ("layers", "embed_dims", "mlp_ratios", "token_mixers"):
        setattr(VisionConfig, key, shape[key])
model, processor = load(bundle)
tower = model.vision_tower
dtype = tower.vision_model.patch_embed.blocks[0].reparam_conv.weight.dtype
_, features, _ = tower(mx.array(np.load(pixels)).astype(dtype).transpose(0, 2, 3, 1))
features = features.reshape(1, -1, features.shape[-1])
own = processor(images=[Image.open(image)], text="<image>")["pixel_values"]
np.savez(
    out,
    features=np.array(features.astype(mx.float32)),
    projected=np.array(model.mm_projector(features).astype(mx.float32)),
    pixels=np.array(own),
)
chat = apply_chat_template(processor, model.config, prompt, num_images=1)
answer = generate(model, processor, chat, [image], max_tokens=int(max_tokens), temperature=0.0)
print(json.dumps(answer.text))
