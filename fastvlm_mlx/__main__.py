"""`fastvlm`, and `python -m fastvlm_mlx`."""

import sys


def main() -> None:
    """Run the command line; a Ctrl-C while it is still being imported is no traceback."""
    try:
        from fastvlm_mlx.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
