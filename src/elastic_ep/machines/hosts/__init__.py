"""Who has which number among a group's hosts, and until when what ran there may go on."""
