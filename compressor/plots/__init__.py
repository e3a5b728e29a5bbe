"""Pictures: charts as SVG trees, for the page and as files, and quality over size."""
