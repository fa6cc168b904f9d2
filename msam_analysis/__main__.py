"""``python -m msam_analysis`` is the command ``msam-analysis``, for programs that start modules, such as torchrun."""

from msam_analysis.cli import main

if __name__ == "__main__":
    main()
