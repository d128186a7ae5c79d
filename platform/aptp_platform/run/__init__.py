"""How a run goes: the stages in their order and their folders, what a job script does, the cluster's resources."""
