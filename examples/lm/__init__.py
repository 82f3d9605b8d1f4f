"""The parts of `train_lm.py`, one idea a file.

- `config`: what defines a run, as a value.
- `data`: the text, its held-out part, and which bytes are read at which step.
- `ngram`: the model to beat.
- `model`: the transformer.
- `train`: the optimiser, a training step, and the validation loss.
- `checkpoint`: files that survive a crash.
- `sample`: generating text through a key-value cache.
- `curve`: the picture.
"""
