"""Which x_t is trained on (Algorithm 1): the prior over sources, roll-outs, the replay buffer, measures of the shift."""
