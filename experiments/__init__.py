"""One file a question: prediction, measurement, verdict."""
