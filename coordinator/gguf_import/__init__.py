"""A llama-family GGUF file becomes a Hugging Face folder: the one conversion, for models that exist in no other form.

header       the file's metadata and list of tensors, checked
config       metadata -> config.json, generation_config.json
rope         metadata -> rope_scaling
weights      tensors -> Hugging Face names, row order and values, a few rows at a time
safetensors  names, shapes and bytes -> model.safetensors, one file or several
tokenizer    metadata -> tokenizer.json, tokenizer_config.json
importer     all of it, into a folder that appears only when it is complete
"""

from coordinator.gguf_import.importer import Imported, import_gguf

__all__ = ["Imported", "import_gguf"]
