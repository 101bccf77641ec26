"""Networks, and the velocity that they predict."""
