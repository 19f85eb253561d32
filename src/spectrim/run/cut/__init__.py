"""From ranks to layers: which pass walks the network, and what it does to one target."""
