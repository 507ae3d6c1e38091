"""nanochat: the whole ChatGPT pipeline in one small repository, with custom kernels on its hot paths."""

__version__ = "0.1.0"
