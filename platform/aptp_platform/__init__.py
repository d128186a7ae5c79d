"""APTP on Ray: jobs that train, cut and publish experts, and the server that runs them."""
