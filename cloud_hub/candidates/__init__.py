"""From new weights of a model to a draft release: judged, quantised anew, certified anew."""
