"""transformers' Mistral 3 and LLaVA over Pixtral towers, which see images of any size in one row."""
