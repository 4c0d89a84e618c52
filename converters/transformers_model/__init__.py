"""BwETAFv3 for Hugging Face transformers: the code of a "torch" folder.

Its two other files are copied beside the weights, where `from_pretrained(...,
trust_remote_code=True)` finds them. They import nothing of this repository.
"""
