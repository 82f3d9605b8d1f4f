"""The parts of `train_lm.py`, `generate.py` and `long_context.py`, one idea a file.

- `config`: what defines a run, as a value.
- `data`: the text, its held-out part, and which bytes are read at which step.
- `ngram`: the model to beat.
- `model`: the transformer.
- `train`: the optimiser, a training step, and the validation loss.
- `sharded`: a training step on tokens that are split over devices.
- `checkpoint`: files that survive a crash.
- `caches`: the kinds of key-value caches.
- `pick`: which byte comes next.
- `sample`: generating text through a cache.
- `curve`: the picture.
"""
