"""`python -m barnabas`: the `barnabas` command."""

from barnabas.cli import main

if __name__ == "__main__":
    main()
