"""`python -m raysynth` is the `raysynth` command; `ray job submit` uses this form."""

from raysynth.cli import main

if __name__ == "__main__":
    main()
