"""What mlx-vlm answers from several `mlx` bundles: run by its own interpreter, without us.

    python answer_mlx_vlm.py IMAGE PROMPT MAX_TOKENS BUNDLE…

The greedy answers, by bundle, are the last line printed, as JSON. The encoder's shape is set to the
first bundle's, as in drive_mlx_vlm.py.
"""

import json
import sys
from pathlib import Path

from mlx_vlm import generate, load
from mlx_vlm.models.fastvlm.config import VisionConfig
from mlx_vlm.prompt_utils import apply_chat_template

image, prompt, max_tokens, *bundles = sys.argv[1:]
shape = json.loads((Path(bundles[0]) / "config.json").read_text())["vision_config"]
for key in ("layers", "embed_dims", "mlp_ratios", "token_mixers"):
    setattr(VisionConfig, key, shape[key])
answers = {}
for bundle in bundles:
    model, processor = load(bundle)
    chat = apply_chat_template(processor, model.config, prompt, num_images=1)
    answer = generate(model, processor, chat, [image], max_tokens=int(max_tokens), temperature=0.0)
    answers[bundle] = answer.text
print(json.dumps(answers))
