"""One small file per format: each reads a file (or series) into arrays, and names the file when it cannot."""
