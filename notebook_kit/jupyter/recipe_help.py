"""What `notebook-kit merge --help` says of recipes; apart, so that asking for help loads nothing."""

RECIPES = """\
A recipe is a TOML file; paths are relative to it:

  method = "ties"                        # any merging method of `notebook-kit catalog`
  base = "models/base"                   # a .safetensors file, or a folder, sharded or not
  experts = ["models/a", "models/b"]     # likewise; a peft LoRA folder stands for base + its change
  out = "models/merged"                  # or --out; a folder if base is one
  dtype = "bfloat16"                     # optional: of the result; sums are taken in float32

  [hyperparameters]                      # of the method, named as in Python; those left out keep their defaults
  density = 0.5
  scale = 0.8
  weights = [0.7, 0.3]

  [arguments]                            # data of methods that need it: paths of .safetensors, one or a list
  fishers = ["fisher_a.safetensors", "fisher_b.safetensors"]

A .yml or .yaml file is read as mergekit's, for: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties,
breadcrumbs, breadcrumbs_ties, della, della_linear, model_stock, sce, karcher. Slices, gradients over layers, filters
and tokenizers are refused by name.

`--dry-run` reads headers and a few tensors, says what would be done and what it would cost, and writes nothing.
"""
