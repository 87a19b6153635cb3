"""Model files in and out: pretrained weights, tokenizers, chat templates, adapters, exports, training runs.

Read `checkpoint` first: `load_checkpoint` turns a name, a file or a folder into architecture, parameters and
tokenizer. `arrays` is what all readers share, and `model_files` opens and writes files; `gguf_file`,
`hf_folder` and `run_folder` are the readers, `download` fetches models by name, and `tiny` makes one up.
`tokenizer` and `chat` turn text into tokens, with the help of `added_tokens` and `template_limits`. `adapter`
reads and writes adapters, `export` and `gguf_copy` write models for other engines. `build` makes NNX modules of
parameters.

This package imports `model`, never the reverse.
"""
