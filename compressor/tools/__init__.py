"""Folders to folders: pack, unpack, import, verify."""
