"""The bodies of requests and answers: read, checked, matched with what is served, written."""
