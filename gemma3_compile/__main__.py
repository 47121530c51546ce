"""``python -m gemma3_compile`` is ``gemma3c``."""

from gemma3_compile.cli import main

if __name__ == "__main__":
    main()
