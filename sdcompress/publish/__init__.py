"""A finished model to the Hugging Face Hub: model card and upload."""
