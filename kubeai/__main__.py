"""``python -m kubeai``."""

from kubeai.cli import main

if __name__ == "__main__":
    main()
