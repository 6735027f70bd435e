"""The adapters of a layer, their memory, and the slots that give them numbers."""
