"""Names on the command line of the plans for absent GPUs; imports nothing."""

LARGE = "large"
MODELS = ("gpt", "resnet", "moe", "small", LARGE)
MODELS_BY_DEFAULT = ("gpt", "resnet", "moe", LARGE)
