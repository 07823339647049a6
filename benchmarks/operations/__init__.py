"""What the encoder in MLX does for one image, beside mlx-vlm's, counted and not measured.

`python -m benchmarks.operations [--size 1024] --mlx-vlm PYTHON [--keep | --table]`
"""
