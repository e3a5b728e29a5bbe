"""A checkpoint as bytes on disk: read, written, packed entries, sums, the work state of a run."""
