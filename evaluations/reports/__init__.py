"""Pages of what commands leave in folders: sampling runs, likelihoods, trainings and studies."""
