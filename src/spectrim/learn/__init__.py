"""Gates and scores on the components of a decomposition, learned: ACIP and SoCo."""
