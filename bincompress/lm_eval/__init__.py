"""bincompress as a model of lm-evaluation-harness: `lm_eval --model bincompress --model_args store=STORE`.

`python -m bincompress.lm_eval` is the harness's own command line with this model, for releases that do not look for
models of other packages (0.4.13 and earlier).
"""
