-- Catalog queries of a replay: tables and keys of a schema, its privileges, and open snapshots.

-- name: tables_of
-- Tables, not their partitions. Health windows come last: reading them blocks the drop of expired partitions.
SELECT c.relname AS name
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relkind IN ('r', 'p') AND NOT c.relispartition
ORDER BY c.relkind = 'p', c.relname;

-- name: key_of
SELECT a.attname AS name
FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN unnest(i.indkey) WITH ORDINALITY AS k (attnum, place)
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = k.attnum
WHERE n.nspname = :schema AND c.relname = :table AND i.indisprimary
ORDER BY k.place;

-- name: partition_bounds
-- The text FOR VALUES FROM ('...') TO ('...') of each partition.
SELECT pg_get_expr(p.relpartbound, p.oid) AS bound
FROM pg_inherits AS i
JOIN pg_class AS p ON p.oid = i.inhrelid
JOIN pg_class AS c ON c.oid = i.inhparent
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relname = :table;

-- name: open_snapshots
-- Other transactions of this database that hold a snapshot. Those that wait for the locked table are left out: a
-- worker at the start of a batch takes a new snapshot once it has the lock.
SELECT a.pid, l.virtualtransaction AS transaction, a.usename AS user_name, a.application_name
FROM pg_stat_activity AS a
JOIN pg_locks AS l ON l.pid = a.pid AND l.locktype = 'virtualxid' AND l.granted
WHERE a.datname = current_database() AND a.usesysid IS NOT NULL AND a.backend_xmin IS NOT NULL
    AND a.pid <> pg_backend_pid()
    AND NOT EXISTS (
        SELECT FROM pg_locks AS w WHERE w.pid = a.pid AND NOT w.granted AND w.relation = to_regclass(:locked)
    );

-- name: grant_statements
WITH objects AS (
    SELECT 'SCHEMA' AS kind, format('%I', t.nspname) AS object, n.nspowner AS owner, t.nspowner AS owner_now,
        n.nspacl AS rights
    FROM pg_namespace AS n CROSS JOIN pg_namespace AS t
    WHERE n.nspname = :source AND t.nspname = :target
    UNION ALL
    SELECT 'TABLE', format('%I.%I', t.nspname, f.relname), c.relowner, f.relowner, c.relacl
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_class AS f ON f.relname = c.relname
    JOIN pg_namespace AS t ON t.oid = f.relnamespace
    WHERE n.nspname = :source AND t.nspname = :target AND c.relkind IN ('r', 'p', 'v', 'm')
)
SELECT statement FROM (
    SELECT 1 AS turn, format('GRANT %s ON %s %s TO %s%s', a.privilege_type, kind, object,
        CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE format('%I', pg_get_userbyid(a.grantee)) END,
        CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END) AS statement
    FROM objects CROSS JOIN LATERAL aclexplode(rights) AS a WHERE a.grantee <> owner
    UNION ALL
    SELECT 2, format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I GRANT %s ON %s TO %s%s',
        pg_get_userbyid(d.defaclrole), :target::text, a.privilege_type,
        CASE d.defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS'
            ELSE 'TYPES' END,
        CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE format('%I', pg_get_userbyid(a.grantee)) END,
        CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
    FROM pg_default_acl AS d JOIN pg_namespace AS n ON n.oid = d.defaclnamespace
    CROSS JOIN LATERAL aclexplode(d.defaclacl) AS a
    WHERE n.nspname = :source AND a.grantee <> d.defaclrole
    UNION ALL
    SELECT 3, format('ALTER %s %s OWNER TO %I', kind, object, pg_get_userbyid(owner))
    FROM objects WHERE owner <> owner_now
    UNION ALL -- a partition that only the target has gets the owner of its table
    SELECT 4, format('ALTER TABLE %I.%I OWNER TO %I', t.nspname, p.relname, pg_get_userbyid(c.relowner))
    FROM pg_inherits AS i
    JOIN pg_class AS p ON p.oid = i.inhrelid AND p.relkind = 'r'
    JOIN pg_class AS f ON f.oid = i.inhparent
    JOIN pg_namespace AS t ON t.oid = f.relnamespace
    JOIN pg_class AS c ON c.relname = f.relname
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :source AND t.nspname = :target AND p.relowner <> c.relowner
) AS s ORDER BY turn;

-- name: size_of$
SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relkind IN ('r', 'm');
