"""What a user's folder holds, before anything of it is taken: pictures, tables, levels of folders, masks, and what is none of them."""
