"""mlx-vlm's server for a bundle of layout mlx, run by a Python that has mlx-vlm.

python serve_mlx_vlm.py BUNDLE PORT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    bundle, port = Path(sys.argv[1]), sys.argv[2]
    from mlx_vlm.models.fastvlm.config import VisionConfig
    from mlx_vlm.server.cli import main as serve

    shape = json.loads((bundle / "config.json").read_text())["vision_config"]
    # It takes the encoder's shape from attributes of a class and not from the bundle.
    for key in ("layers", "embed_dims", "mlp_ratios", "token_mixers"):
        setattr(VisionConfig, key, shape[key])
    sys.argv = ["mlx_vlm.server", "--model", str(bundle), "--host", "127.0.0.1", "--port", port]
    serve()


if __name__ == "__main__":
    main()
