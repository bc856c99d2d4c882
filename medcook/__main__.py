"""`python -m medcook` is the same as `medcook`, where the script is not on the path."""

from medcook.cli import main

if __name__ == "__main__":
    main()
