"""From records to columns on disk: `tide prepare`, in one process or many, restartable, in parts."""
