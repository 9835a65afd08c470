"""The quickstart of `layerwise_jax.examples`: a small transformer trained staged and unstaged.

python -m experiments.quickstart
"""

from absl import app, flags

from layerwise_jax.examples import quickstart

flags.adopt_module_key_flags(quickstart)

if __name__ == "__main__":
    app.run(quickstart.main)
