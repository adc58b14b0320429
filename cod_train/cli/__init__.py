"""The commands that this package adds to `cod`, one module per noun; entry points in pyproject.toml name them."""
