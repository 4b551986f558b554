int zerokl_placeholder = 0;
