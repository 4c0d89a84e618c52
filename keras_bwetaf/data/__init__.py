"""From text to batches: sources, packing, loading."""

from keras_bwetaf.data.documents import Documents
from keras_bwetaf.data.instructions import chat_prompt, load_instructions
from keras_bwetaf.data.loading import document_numbers, load_packed
from keras_bwetaf.data.packing import PackingReport, pack
from keras_bwetaf.data.sources import read_documents
from keras_bwetaf.data.tracking import track

__all__ = [
    "Documents",
    "PackingReport",
    "chat_prompt",
    "document_numbers",
    "load_instructions",
    "load_packed",
    "pack",
    "read_documents",
    "track",
]
