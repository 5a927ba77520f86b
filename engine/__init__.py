"""Everything that touches weights, models and measurements; knows nothing of terminals.

Rooms: `weights` (bytes on disk), `merge`, `gguf`, `chat`, `evaluate`, `jobs`. See docs/architecture.md.
"""

__version__ = "0.1.0"
