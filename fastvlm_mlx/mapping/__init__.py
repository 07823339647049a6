"""One question about every image of a folder: a row for each, in a file that a killed run loses
nothing of.

    from fastvlm_mlx.mapping import Job, map_folder

    map_folder(Job("my-bundle", "images", "Describe the image."), "captions.jsonl")

`images` lists the folder, `job` asks, `rows` and `journal` are the file, `run` puts them together,
`parquet` converts, and `on_ray` lets the workers of a Ray cluster ask.
"""

from fastvlm_mlx.mapping.job import Job as Job
from fastvlm_mlx.mapping.run import Tally as Tally
from fastvlm_mlx.mapping.run import map_folder as map_folder
