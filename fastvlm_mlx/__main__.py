from fastvlm_mlx.cli import main

main()
