"""Arrays in, numbers out: classification, masks, sets of features, resamples, copies."""
