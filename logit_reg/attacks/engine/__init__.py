"""What attacks share: protocol, losses, random numbers, loops, and faster forms of a network."""
