"""Names on the command line of the training experiment; imports nothing."""

SUBJECTS = ("mlp", "gpt", "resnet", "small")
