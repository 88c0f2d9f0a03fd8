"""Runs the command line as `python -m edgelam_fl`, for an environment whose `edgelam` is not on the path."""

from edgelam_fl.cli.main import main

if __name__ == "__main__":
    main()
