"""Other tools' traces: one small file per format, and a registry of them."""

from specmoe.sources.importers._columns import column_map
from specmoe.sources.importers.base import ForeignTrace, ImportedDocument, Importer, ImportOptions
from specmoe.sources.importers.registry import IMPORTERS, import_trace, recognise

__all__ = [
    "IMPORTERS",
    "ForeignTrace",
    "ImportOptions",
    "ImportedDocument",
    "Importer",
    "column_map",
    "import_trace",
    "recognise",
]
