"""What users look at: the live view of the branches (`live`), and the timeline of a response (`timeline`)."""
